"""Stand-ins for tests: of this project, of its plugins, and of programs that embed it.

fake_engine.py  FakeEngine: the interface of an Engine, without a model
hash_model.py   HashModel: runs a scheduler's plans; a wrong block changes every later token
model_case.py   ModelCase: a tiny configuration of an architecture, for the model kit
scheduler_*.py  World: a scheduler, the hash model and an oracle, checked after every operation
tiny_models.py  model folders of each family, with random weights that transformers made
"""
