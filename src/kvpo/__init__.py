"""kvpo: preference alignment of streaming autoregressive video generators by KV-cache policy optimisation."""

__version__ = "0.1.0"
