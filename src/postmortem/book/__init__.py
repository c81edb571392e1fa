"""From notebooks to pages: run, publish, draw, build."""
