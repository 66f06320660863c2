"""From the report to the code: which function builds which section, equation or table, and which test proves it.

Only what exists is listed. `docs/report_to_course.md` is written from here; a test imports every function and finds
every test.
"""

from typing import NamedTuple


class Row(NamedTuple):
    """`code` is a dotted name under minidsv3, `test` is `file::function` under tests/."""

    report: str
    idea: str
    code: str
    test: str


REPORT = (
    Row("2.1.1, eqs. 1-5", "keys and values from one latent and one shared rotary key", "attention.MLA.compress",
        "test_attention.py::test_cache_holds_the_normed_latent_and_the_rotated_key"),
    Row("2.1.1, eqs. 6-9", "queries, compressed too", "attention.MLA.query",
        "peers/test_transformers.py::test_same_logits"),
    Row("2.1.1, eqs. 10-11", "attention, keys and values expanded", "attention.MLA.expanded",
        "peers/test_transformers.py::test_same_logits"),
    Row("2.1.1 (told in DeepSeek-V2's)", "attention, up-projections absorbed", "attention.MLA.absorbed",
        "test_attention.py::test_absorbed_equals_expanded_in_values_and_gradients"),
    Row("2.1.1 (our count)", "which form costs less for T new tokens", "attention.MLA.absorbing_is_cheaper",
        "test_views_mla.py::test_the_cheaper_form_is_the_package_s"),
    Row("2.1.1", "the latent cache: 576 values a token and layer", "attention.LatentCache",
        "test_attention.py::test_cached_equals_full"),
    Row("2.1.2, eq. 12", "shared and routed experts, no token dropped", "moe.MoE",
        "test_moe.py::test_loop_is_equation_12"),
    Row("2.1.2, eqs. 13-16", "affinities, bias for selection, weights", "kernels.route_reference",
        "test_kernels.py::test_route_is_its_equations_ties_included"),
    Row("2.1.2, node-limited routing", "a token goes to few groups of experts", "kernels.route_reference",
        "test_kernels.py::test_a_group_is_worth_its_two_best"),
    Row("2.1.2, auxiliary-loss-free balancing", "the bias moves by gamma after each step", "balance.update_biases",
        "test_balance.py::test_overloaded_experts_step_down_and_idle_ones_up_by_gamma_whatever_the_violation"),
    Row("2.1.2, eqs. 17-20", "sequence-wise balance loss", "balance.sequence_balance_loss",
        "test_balance.py::test_sequence_loss_is_its_equations"),
    Row("2.1.2, node-limited routing; 3.2.2", "tokens to the GPUs of their experts and back, once to each node",
        "parallel.dispatch.dispatch", "parallel/test_dispatch.py::test_ranks_together_are_one_process"),
    Row("3.2.2", "rows on wires between nodes and inside, and their time", "parallel.traffic.by_node",
        "parallel/test_traffic.py::test_the_limit_bounds_rows_only_where_nodes_are_merged"),
    Row("3.2", "pipeline ranks, copies of experts, ranks that share them", "parallel.mesh.make_mesh",
        "parallel/test_mesh.py::test_the_full_model_spreads_over_a_fake_world"),
    Row("3.4, redundant experts", "EPLB: which GPU hosts which experts", "parallel.placement.rebalance_experts",
        "parallel/test_placement.py::test_the_published_example"),
    Row("3.4.1", "the prefilling unit", "parallel.placement.prefill",
        "parallel/test_placement.py::test_prefilling_unit"),
    Row("3.4.2", "the decoding unit", "parallel.placement.decode", "parallel/test_placement.py::test_decoding_unit"),
    Row("4.5.3, batch-wise balance", "the same loss with the batch as one sequence", "balance.sequence_balance_loss",
        "test_balance.py::test_sequences_are_balanced_one_by_one"),
    Row("2.2, eqs. 21-23", "a module that predicts one token further", "mtp.MTPModule",
        "test_mtp.py::test_drafts_are_the_checkpoints_formula"),
    Row("2.2, eqs. 24-25", "its loss, divided by T", "mtp.prediction_loss", "test_mtp.py::test_loss_is_equation_24"),
    Row("2.2, inference", "speculative decoding with that module", "generate.generate",
        "test_generate.py::test_speculative_equals_plain_in_float32"),
    Row("5.4.3", "what an acceptance rate buys: tokens a pass, and speed", "cost.speculative_speed",
        "test_cost.py::test_speculative_decoding_at_the_report_s_acceptance"),
    Row("4.1", "fill-in-the-middle, PSM", "data.fill_in_the_middle",
        "test_data.py::test_fill_in_the_middle_spells_prefix_suffix_middle"),
    Row("4.1", "packing without padding or masks", "data.PackedBatches",
        "test_data.py::test_an_epoch_holds_every_document_once_end_to_end"),
    Row("4.2, model hyper-parameters", "the configuration", "config.ModelConfig",
        "test_config.py::test_full_is_the_published_file"),
    Row("4.2, training hyper-parameters", "every schedule, as a function of tokens seen", "optim.Recipe",
        "test_optim.py::test_full_recipe_is_the_report"),
    Row("4.3", "YaRN", "rope.rope_table",
        "test_rope.py::test_published_numbers_of_the_full_model"),
    Row("4.3 (released code: on the whole logit)", "the softmax scale under YaRN", "rope.softmax_scale",
        "test_course_mla.py::test_scales_of_the_published_model"),
    Row("3.3.2, fine-grained quantisation", "1 x 128 tiles of activations, with a scale each",
        "kernels.quantize.quantize_tiles", "kernels/test_quantize.py::test_tiles_are_their_equation"),
    Row("3.3.1, mixed precision framework", "three FP8 products of every matrix, the rest in BF16 or FP32",
        "fp8.to_fp8", "test_fp8.py::test_fp8_learns_as_bf16_does"),
    Row("3.2.3, recomputation of RMSNorm and up-projections", "what a layer keeps for its backward pass",
        "parallel.memory.kept_by_layer", "test_recompute.py::test_a_layer_keeps_what_the_report_says_and_no_more"),
    Row("3.3.2, fine-grained quantisation", "128 x 128 blocks of weights", "kernels.quantize.quantize_blocks",
        "kernels/test_quantize.py::test_the_latent_projection_has_five_rows_of_blocks"),
    Row("3.3.2, mantissa over exponents", "E4M3 for all tensors", "formats.round_to",
        "test_formats.py::test_rounding_is_to_nearest_even"),
    Row("3.3.2 and 3.5.2, accumulation precision", "a model of the tensor core's sum of 14 bits",
        "accumulate.accumulate", "test_accumulate.py::test_the_model_is_its_three_steps"),
    Row("3.3.3, low-precision activation", "E5M6 in memory, its scales powers of two (encoding: our choice)",
        "e5m6.quantize_e5m6", "test_e5m6.py::test_what_comes_back_is_e5m6_with_power_of_two_tiles"),
    Row("3.3.2, increasing accumulation precision", "the FP8 product, promoted each 128 of K",
        "kernels.fp8_gemm", "kernels/test_fp8_gemm.py::test_sums_outside_of_the_tensor_cores_are_in_fp32"),
    Row("3.3.3, low-precision optimiser states", "AdamW with BF16 moments", "optim.AdamW",
        "test_optim.py::test_bf16_moments_differ_by_their_rounding_alone"),
    Row("3.2.3, exponential moving average", "an average of the weights", "optim.EMA",
        "test_optim.py::test_ema_is_the_weighted_sum_of_the_weights"),
    Row("1, table 1", "GPU hours and dollars", "cost.dollars", "test_cost.py::test_hours_and_dollars_of_the_report"),
    Row("released weights", "names, shapes, duplicates and dtypes", "checkpoint.save_checkpoint",
        "test_checkpoint.py::test_full_size_has_the_published_names_shapes_and_counts"),
)
