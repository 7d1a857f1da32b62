"""IP-Adapters: the variants, the attention that they add to a UNet, and their files."""
