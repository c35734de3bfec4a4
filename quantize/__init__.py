"""Real numbers to int4: calibrate, solve codes and scales layer by layer, pack."""
