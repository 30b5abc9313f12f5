"""Make the bucket named on the command line, unless it is there: `python make_bucket.py NAME`. The variables of boto3 say where."""

import os
import sys

import boto3

client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
if sys.argv[1] not in {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}:
    client.create_bucket(Bucket=sys.argv[1])
