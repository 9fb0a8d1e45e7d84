"""Which sequences run in the next step, and where their keys and values live. No tensors here.

scheduler.py   the door: requests in, a plan per step out, results back in
roster.py      all live sequences, and how they move: admitted, preempted, forked, ended
planner.py     a step's plan: budget, preemption, admission
collector.py   a step's result: tokens, ends, failures
in_flight.py   planned steps without a result, and what a failure among them touches
queue.py       the sequences that wait
policies.py    the order of the queue, and whom to preempt
fairness.py    the policy by which owners share
stopping.py    whether a sequence ends with its newest token
sequence.py    one request's scheduling state: touched at its milestones, never per token
table.py       the running sequences as columns, indexed by a stable row
steady.py      steps in which everybody decodes, as a handful of vector operations
paging.py      block tables: slots, copy on write, windows
prefix_cache.py  which blocks a prompt finds, and which others may find
hashing.py     what identifies a block's content
blocks.py      the pool: reference counts, the free list, and the prefix cache's map
"""
