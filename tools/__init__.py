"""What maintainers run by hand: train the models that are shipped, derive tables, measure."""
