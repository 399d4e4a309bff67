"""Writer process: the loop decides, the journal thread commits."""
