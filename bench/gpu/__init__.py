"""`python -m bench.gpu`: the kernels and the engine on one GPU, checked and timed beside limits.

    machine   versions; what copying and matrix products reach: the limits of all that follows
    check     every kernel against float64 on fresh random inputs, graphs, whole answers
    speed     prefill attention beside SDPA, all that moves memory beside the copy rate
    tune      other configurations of both attention kernels (only when asked for)
    model     whole models with random weights: prefill, decode steps, the host's share
    cluster   prefill and decode as two processes on the one device, beside an undivided worker

A part runs in a process of its own: one that crashes, hangs or breaks the device leaves the others
alone. Everything found is in the JSON as soon as its part has ended.
"""
