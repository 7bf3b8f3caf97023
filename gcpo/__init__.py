"""Group Causal Policy Optimization."""
__version__ = "0.1.0"
