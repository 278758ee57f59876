"""The encoder as clients of others call it, one file per client.

But for `huggingface` each imports its client, which is not installed with the
package: `make clients` builds an environment with all of them and runs each
against an encoder.
"""
