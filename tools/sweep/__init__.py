"""The coverage sweep: every torchvision model, and one of each of timm's files, through all of dspfx."""
