"""How what is stored is tuned: blocks, the whole model, adapters."""
