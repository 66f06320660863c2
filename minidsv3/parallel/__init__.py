"""Many processes, one model: pipelines, experts on many ranks, and the mesh that joins them (report section 3).

    schedule     in which order the ranks of a pipeline work          simulate    what that costs, as a timeline
    stage        the model cut into pieces                            places      which rank holds which piece
    pipeline     runs a batch through all pieces
    runtime, torch_stage    what torch's pipeline runtime lacks for that
    dispatch     tokens to the ranks of their experts and back        experts     the experts of one rank
    mesh         who shares what; FSDP2                               placement   which GPU hosts which expert
    train        a run on many ranks                                  saves       its state, for any other layout
    processes    several ranks on one machine, for tests and notebooks
    layout, memory, built, traffic, step_time, plan, plan_text        what a layout holds, sends and takes
"""
