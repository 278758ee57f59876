"""The decoder that answers: its files, its words, its evaluation."""
