"""Stand-ins for tests and conformance kits: for this project, its plugins, and who embeds it.

fake_engine.py       FakeEngine: the interface of an Engine, without a model
hash_model.py        HashModel: runs a scheduler's plans; a wrong block changes every later token
scheduler_*.py       World: a scheduler, the hash model and an oracle, checked after every operation
tiny_models.py       model folders of each family, with random weights that transformers made
checks.py            Check: a promise that a kit puts to the test
model_case.py        ModelCase: a tiny configuration of an architecture
model_kit.py         its logits in every schedule, against transformers
pooled_kit.py        vectors and scores of encoders, and of decoders without a head
bounds.py            how far from its reference what a model computes may be
hostile_configs.py   configs that lie, each of which it must refuse
schedules.py         the schedules: chunks, decodes, batches, cached prefixes
paged_model.py       PagedModel: a model over a paged cache, driven by hand
drawn_checkpoint.py  a checkpoint for an architecture that transformers does not have
quantizer_kit.py     a format's error and size, as its QuantizerCase (quantizer_case.py) promises
experts_kit.py       and those of experts; stored_tensors.py loads what a case stores
written_*.py         matrices as the formats of checkpoints store them
writer_kit.py        a format that weights are written in is read as it says
backend_kit.py       every operation against plain torch; backend_steps.py makes steps for it
policy_kit.py        orders and victims of a scheduling policy
mount_kit.py         a server from start to end
plugin_checks.py     all of them, for one plugin; pytest_plugin.py makes cases of a test of them
"""
