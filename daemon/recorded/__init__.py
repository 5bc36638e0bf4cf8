"""`homeostat detect`: detectors over a recorded file. Light to import: the command line reads its arguments only."""
