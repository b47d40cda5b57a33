"""What frozen features are worth: k-NN, linear probes, dense retrieval and object discovery."""
