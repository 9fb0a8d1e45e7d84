"""Stand-ins for tests: of this project, of its plugins, and of programs that embed it.

fake_engine.py  FakeEngine: the interface of an Engine, without a model
"""
