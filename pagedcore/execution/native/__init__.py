"""The backend "native": the CPU's operations in bfloat16, in C.

library.py     compiles the kernels where a compiler is at hand, once, and loads them
ops.py         NativeOps: the backend; what it has no kernel for is `TorchOps`'s
pool.c         threads that share the tasks of a kernel
common.h       vectors of bfloat16, exp, the inner product that all products are made of
panels.h       rows times a panel: 32 outputs of a weight
linear.c       linear layers, over weights in panels
grouped.c      linear layers, over weights of 4 and 8 bits
grouped_ops.py GroupedOps: which of the two it is
attention.c    attention over a paged cache
rows.c         norms, gates, rotation, writes into the cache, the most likely token
"""
