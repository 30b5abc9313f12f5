"""Post-training quantization of the linear layers of decoder blocks. Planning imports `settings` and `schemes`: no torch there."""
