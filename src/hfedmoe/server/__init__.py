"""The server side: a Flower ServerApp that runs rounds of sampling, planning, training, averaging and evaluation."""
