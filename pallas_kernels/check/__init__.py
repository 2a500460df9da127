"""Every kernel through its vendor's compiler, for chips that are not here: `python -m pallas_kernels.check`.

In: names of topologies. Out: a line for each kernel (registers, spills, VMEM or shared memory, time of its program),
and exit code 1 if one does not compile, spills more than its case allows, or if an oversized tile is *not* refused.

    cases (what is compiled) ─► program (one topology, one process) ─► judge (is it well?) ─► __main__ (a table)

Nothing runs: numbers are the compilers' (ptxas, libtpu), not measurements of speed.
"""
