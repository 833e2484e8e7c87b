"""What tests share: a real S3 server, writers of small stores, a proxy that fails on purpose."""
