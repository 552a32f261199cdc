"""The demo model: its texts, its training, its evaluation, and the training runs that go wrong on purpose."""
