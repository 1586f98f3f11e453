"""Recurrent nets: drop-in GRU and LSTM layers, and scans of gated cells of one's own."""
