"""What an operator may ask of a running daemon, freeze, resume, reset, rollback, checkpoint, reload, drain."""
