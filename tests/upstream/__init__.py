"""What the upstream library `rxlm` computes, seen from outside (see `oracle.py`); our package never imports it."""
