"""Programs around the package: its rehearsal, its S3 server, its demo, its generated pages."""
