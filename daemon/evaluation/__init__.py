"""`homeostat evaluate`: a recorded stream replayed through the loop, configurations side by side."""
