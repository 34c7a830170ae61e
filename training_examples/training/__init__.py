"""What training runs share: options, one run of the plain Trainer, what is logged, how a run is resumed."""
