"""Which sequences run in the next step, and where their keys and values live. No tensors here.

policies.py    the order of the queue, and whom to preempt
sequence.py    one request's scheduling state: touched at its milestones, never per token
table.py       the running sequences as columns, indexed by a stable row
hashing.py     what identifies a block's content
blocks.py      the pool: reference counts, the free list, and the prefix cache's map
paging.py      block tables: look-up, slots, copy on write, windows
stopping.py    whether a sequence ends with its newest token
scheduler.py   the step: budget, admission, preemption, forks, results
"""
