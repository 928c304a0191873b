"""An S3 server that checks signatures and permissions. Prints its port and one user's key and secret.

Ends when its standard input does, so that it never outlives the tests, however they end.
"""

import os
import sys
import threading

# The first requests, those that make the user, need no signature; every later one does.
os.environ["INITIAL_NO_AUTH_ACTION_COUNT"] = "3"
# The server's own client must not look for credentials elsewhere.
os.environ["AWS_EC2_METADATA_DISABLED"] = "true"

import boto3
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

app = DomainDispatcherApplication(create_backend_app)
server = make_server("127.0.0.1", 0, app, threaded=True)
threading.Thread(target=server.serve_forever, daemon=True).start()


def client(service, key, secret):
    return boto3.client(
        service,
        endpoint_url=f"http://127.0.0.1:{server.port}",
        region_name="us-east-1",
        aws_access_key_id=key,
        aws_secret_access_key=secret,
    )


iam = client("iam", "none", "none")
iam.create_user(UserName="tests")
access = iam.create_access_key(UserName="tests")["AccessKey"]
policy = '{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]}'
iam.put_user_policy(UserName="tests", PolicyName="s3", PolicyDocument=policy)
key, secret = access["AccessKeyId"], access["SecretAccessKey"]
client("s3", key, secret).create_bucket(Bucket="models")
print(server.port, key, secret, flush=True)
sys.stdin.read()
