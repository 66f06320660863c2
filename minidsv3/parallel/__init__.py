"""Many processes, one model: pipelines, experts on many ranks, and the mesh that joins them (report section 3).

`schedule` says in which order the ranks of a pipeline work, `simulate` what that costs.
"""
