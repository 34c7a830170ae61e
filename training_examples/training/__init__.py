"""What training runs share: what is logged and how a run is resumed."""
