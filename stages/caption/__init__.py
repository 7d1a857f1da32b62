"""A further caption by a model: the stage, and the two kinds of models that it can have."""
