"""The backend "native": the CPU's operations in bfloat16, in C.

library.py     compiles the kernels where a compiler is at hand, once, and loads them
ops.py         NativeOps: the backend; what it has no kernel for is `TorchOps`'s
pool.c         threads that share the tasks of a kernel
common.h       vectors of bfloat16, exp, the inner product that all products are made of
linear.c       linear layers, over weights in panels of 64 outputs
attention.c    attention over a paged cache
rows.c         norms, gates, rotation, writes into the cache, the most likely token
"""
