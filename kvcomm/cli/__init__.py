"""The `kvcomm` command: one file per subcommand, `app` joins them, `output` prints for people or as JSON.

The top of this list of imports: everything else may be used from here, nothing else imports this. Modules
here import only what `--help` needs; torch, transformers and the engine are imported inside the functions
that run a command.
"""
