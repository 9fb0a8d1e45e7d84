"""Check the kernels against plain torch, time them, and search for their best settings.

steps.py    random steps over a paged cache, with NaN wherever nobody may look
checks.py, packed_checks.py   each kernel against torch in higher precision
clock.py    times, of work that does not find its data in the L2 cache
speed.py    each kernel's rate, beside what the device can do
tuning.py   the settings of both attention kernels, by shape
packed_tuning.py   the plans of products with packed weights, which are kept on disk
suite.py    all of it, as `pagedcore bench kernels` asks for it

`bench/kernels.py` in the repository runs it without an installation.
"""
