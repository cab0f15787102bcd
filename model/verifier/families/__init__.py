"""The families of networks that are verified, one file each."""
