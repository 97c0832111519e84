"""report.html: what a run did, on one page that opens without a network (`hfedmoe report`)."""
