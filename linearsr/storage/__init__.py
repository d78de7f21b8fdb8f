"""Files on local disks and on S3, behind one type of path. Needs no Ray."""
