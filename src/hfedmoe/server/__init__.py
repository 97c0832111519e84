"""One server: rounds of sampling, planning, training, folding and measuring (a flwr ServerApp)."""
