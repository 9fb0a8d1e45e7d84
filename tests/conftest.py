"""What all tests share: a busy machine makes no property false, so Hypothesis has no deadline."""

from hypothesis import settings

settings.register_profile("unhurried", settings(), deadline=None)
settings.load_profile("unhurried")
