"""Stand-ins for tests: of this project, of its plugins, and of programs that embed it.

fake_engine.py  FakeEngine: the interface of an Engine, without a model
tiny_models.py  model folders of each family, with random weights that transformers made
"""
