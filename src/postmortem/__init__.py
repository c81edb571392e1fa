"""A reproducible failure analysis for LoRA adapters."""
