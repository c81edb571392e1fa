"""What the notebooks call: ask systems, measure their answers, keep the records."""
