"""What the upstream library `rxlm` computes, measured from outside (see `oracle.py`); it is never imported by our package."""
