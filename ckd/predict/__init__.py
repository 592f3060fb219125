"""`ckd predict`: the classes of images, by a trained student."""
