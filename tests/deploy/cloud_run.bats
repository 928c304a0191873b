#!/usr/bin/env bats
# scripts/deploy/cloud-run/deploy against a stand-in for gcloud that knows the real commands' flags (bin/gcloud).

# What one plain run leaves is where many of the tests begin.
setup_file() {
    export GCLOUD_STATE=$BATS_FILE_TMPDIR/deployed
    PATH=$BATS_TEST_DIRNAME/bin:$PATH "$BATS_TEST_DIRNAME/../../scripts/deploy/cloud-run/deploy" --alerts projects/test-project/notificationChannels/1
}

deployed() {
    rm -rf "$GCLOUD_STATE"
    cp -r "$BATS_FILE_TMPDIR/deployed" "$GCLOUD_STATE"
    : >"$GCLOUD_STATE/log"
}

setup() {
    root=$(cd "$BATS_TEST_DIRNAME/../.." && pwd)
    export GCLOUD_STATE=$BATS_TEST_TMPDIR/cloud WAIT_SECS=0
    mkdir -p "$GCLOUD_STATE"
    : >"$GCLOUD_STATE/log"
    PATH=$BATS_TEST_DIRNAME/bin:$PATH
    deploy=$root/scripts/deploy/cloud-run/deploy
    weights=$root/tests/golden/small.safetensors
}

log() { cat "$GCLOUD_STATE/log"; }
called() { log | grep -qE -- "$1" || { echo "not called: $1" && log && return 1; }; }
not_called() { ! log | grep -E -- "$1"; }
said() { [[ $output == *"$1"* ]] || { echo "not said: $1" && echo "$output" && return 1; }; }
manifest() { cat "$GCLOUD_STATE/services/image-generator"; }

@test "the whole way: everything is made, the weights are verified, a digit is drawn, the price is said" {
    run "$deploy"
    [ "$status" -eq 0 ] || { echo "$output" && false; }
    called '^services enable run.googleapis.com .*storage.googleapis.com'
    called '^storage buckets create gs://test-project-image-generator-models .*--public-access-prevention'
    called '^storage buckets add-iam-policy-binding .*serviceAccount:image-generator-run@.*roles/storage.objectViewer'
    called '^builds submit'
    called '^curl .*https://image-generator-x.example/v1/digits/7'
    not_called 'allUsers'
    said 'verified gs://test-project-image-generator-models/'
    said 'drawn: 200'
    said 'idle: no instance, $0 a month'
    digest=$(sha256sum "$root/src/model/mnist.safetensors" | cut -c1-16)
    manifest | grep -q "gs://test-project-image-generator-models/$digest/mnist.safetensors"
}

@test "a second run makes nothing anew" {
    deployed
    run "$deploy"
    [ "$status" -eq 0 ]
    not_called '^(services enable|storage cp|builds submit)|(buckets|repositories|service-accounts) create'
    called '^run services replace'
}

@test "other weights go beside the old ones, with memory that fits them" {
    deployed
    run "$deploy" --model "$weights"
    [ "$status" -eq 0 ]
    [ "$(find "$GCLOUD_STATE/objects" -name '*.safetensors' | wc -l)" -eq 2 ]
    manifest | grep -q 'memory: 512Mi'
}

# A binary that finds the weights to take so many bytes.
binary() {
    mkdir -p "$BATS_TEST_TMPDIR/binary"
    cat >"$BATS_TEST_TMPDIR/binary/image-generator" <<SH
#!/usr/bin/env bash
if [[ \$1 == pack ]]; then echo digests >"\$2.chunks.json"; else echo "file        1 bytes; in memory $1 bytes"; fi
SH
    chmod +x "$BATS_TEST_TMPDIR/binary/image-generator"
    PATH=$BATS_TEST_TMPDIR/binary:$PATH
}

@test "with the binary at hand, digests of chunks go along, and the memory is what the weights take" {
    binary 3000000000
    run "$deploy" --model "$weights"
    [ "$status" -eq 0 ]
    manifest | grep -q 'memory: 3200Mi'
    manifest | grep -A1 'name: MODEL_SHA256' | grep -q "$(echo digests | sha256sum | cut -d' ' -f1)"
    ls "$GCLOUD_STATE/objects" | grep -q 'safetensors.chunks.json$'
    binary 12000000000
    run "$deploy" --dry-run --model "$weights"
    said 'cpu: "4"'
    binary 40000000000
    run "$deploy" --dry-run --model "$weights"
    [ "$status" -eq 1 ]
    said 'Cloud Run gives 32,768 at most'
}

@test "a dry run calls nothing and prints every command" {
    run "$deploy" --dry-run --alerts projects/p/notificationChannels/1 --secret HF_TOKEN=hf-token --public
    [ "$status" -eq 0 ]
    [ -z "$(log)" ]
    for command in 'services enable' 'service-accounts create' 'buckets create' 'storage cp' 'repositories create' 'builds submit' \
        'run services replace' allUsers print-identity-token 'policies create' secretAccessor; do
        said "$command"
    done
    # With the flags of the real commands, too: what was printed is given to the stand-in.
    commands=$(grep '^+ gcloud' <<<"$output" | sed 's/^+ //')
    while read -r command; do
        run bash -c "${command//=PROJECT/=test-project}"
        [ "$status" -ne 2 ] || { echo "$command: $output" && false; }
    done <<<"$commands"
}

@test "without the bucket: --built-in" {
    run "$deploy" --built-in
    [ "$status" -eq 0 ]
    not_called '^storage'
    manifest | grep -A1 'name: MODEL_URI' | grep -q 'value: ""'
}

@test "public when asked, and private again when not" {
    run "$deploy" --public
    [ "$status" -eq 0 ]
    called '^run services add-iam-policy-binding .*allUsers'
    said 'curl -o seven.png https://'
    run "$deploy"
    called '^run services remove-iam-policy-binding .*allUsers'
    said 'Authorization: Bearer'
}

@test "on an L4" {
    run "$deploy" --gpu
    [ "$status" -eq 0 ]
    called 'builds submit.*_ACCELERATOR=cuda'
    manifest | grep -q 'nvidia.com/gpu: "1"'
    run "$deploy" --gpu --region europe-north1
    [ "$status" -ne 0 ]
    said 'has no L4 in europe-north1'
}

@test "a secret becomes a variable, and the service may read it" {
    run "$deploy" --secret HF_TOKEN=hf-token
    [ "$status" -eq 0 ]
    called '^secrets add-iam-policy-binding hf-token .*roles/secretmanager.secretAccessor'
    manifest | grep -A4 'name: HF_TOKEN' | grep -q 'name: hf-token'
    run "$deploy" --secret HF_TOKEN=other
    [ "$status" -ne 0 ]
    said 'Secret [other] not found'
}

@test "alerts are made once and brought up to date later" {
    deployed
    [ "$(find "$GCLOUD_STATE/alerts" -type f | wc -l)" -eq "$(find "$root/scripts/deploy/cloud-run/alerts" -name '*.json' | wc -l)" ]
    "$deploy" --alerts projects/test-project/notificationChannels/1
    not_called 'policies create'
    called 'policies update'
}

@test "a permission that takes its time is waited for, one that never comes is not" {
    CURL_REFUSE=3 run "$deploy"
    [ "$status" -eq 0 ]
    [ "$(log | grep -c '^curl')" -eq 4 ]
    CURL_REFUSE=1000 run "$deploy"
    [ "$status" -ne 0 ]
    said 'did not draw: 403'
}

@test "a service account deploys with a token for its audience" {
    account=ci@test-project.iam.gserviceaccount.com
    mkdir -p "$GCLOUD_STATE/accounts"
    : >"$GCLOUD_STATE/accounts/$account"
    GCLOUD_ACCOUNT=$account run "$deploy"
    [ "$status" -eq 0 ] || { echo "$output" && false; }
    called "member=serviceAccount:$account"
    called 'print-identity-token --audiences=https://'
}

@test "what is needed is checked first, and nothing is made" {
    GCLOUD_ACCOUNT='' run "$deploy"
    [ "$status" -eq 1 ]
    said 'gcloud auth login'
    GCLOUD_PROJECT='' run "$deploy"
    [ "$status" -eq 1 ]
    said 'there is no project'
    run "$deploy" --project other-project
    [ "$status" -eq 1 ]
    said 'project other-project does not exist'
    GCLOUD_BILLING=False run "$deploy"
    [ "$status" -eq 1 ]
    said 'has no billing account'
    run "$deploy" --model nowhere.safetensors
    [ "$status" -eq 1 ]
    said 'there are no weights at nowhere.safetensors'
    run "$deploy" --service Digits
    [ "$status" -eq 1 ]
    said 'lower-case letters'
    run "$deploy" --secret hf
    [ "$status" -eq 1 ]
    said 'expected NAME=SECRET'
    run "$deploy" --region
    [ "$status" -eq 1 ]
    said '--region needs a value'
    run "$deploy" --frobnicate
    [ "$status" -eq 1 ]
    said 'unknown option --frobnicate'
    mkdir "$BATS_TEST_TMPDIR/bin"
    for tool in bash dirname mktemp rm curl sha256sum sed; do ln -s "$(command -v $tool)" "$BATS_TEST_TMPDIR/bin/"; done
    PATH=$BATS_TEST_TMPDIR/bin run "$deploy"
    [ "$status" -eq 1 ]
    said 'gcloud is not installed'
    not_called 'create|enable|submit|replace|storage'
}

@test "whichever command fails, the run stops there and says which" {
    for command in 'services enable' 'service-accounts create' 'buckets create' 'buckets add-iam-policy-binding' 'storage cp' \
        'repositories create' 'projects add-iam-policy-binding' 'builds submit' 'services replace' 'services add-iam-policy-binding'; do
        rm -rf "$GCLOUD_STATE"
        GCLOUD_FAIL=$command run "$deploy"
        [ "$status" -eq 1 ] || { echo "$command: $status" && false; }
        said PERMISSION_DENIED
        said 'that command failed'
        log | tail -1 | grep -q "$command" || { echo "went on after $command" && log && false; }
    done
    # What was made until the last failure is found again.
    : >"$GCLOUD_STATE/log"
    run "$deploy"
    [ "$status" -eq 0 ]
    not_called 'create|builds submit'
}

@test "no permission to look is not taken for nothing there" {
    for command in 'buckets describe' 'service-accounts describe' 'repositories describe' 'objects describe'; do
        rm -rf "$GCLOUD_STATE"
        GCLOUD_FAIL=$command GCLOUD_ERROR='HTTPError 403: you do not have access' run "$deploy"
        [ "$status" -eq 1 ]
        said 'cannot tell whether it exists'
    done
}

@test "an account that is not known everywhere yet is tried again" {
    # The first grant fails once; the stand-in's pattern matches as long as the file of bindings is empty.
    cat >"$BATS_TEST_TMPDIR/gcloud" <<'SH'
#!/usr/bin/env bash
if [[ $* == *'buckets add-iam-policy-binding'* && ! -e $GCLOUD_STATE/tried ]]; then
    touch "$GCLOUD_STATE/tried"
    echo 'ERROR: HTTPError 400: Service account image-generator-run does not exist.' >&2
    exit 1
fi
exec "$REAL" "$@"
SH
    chmod +x "$BATS_TEST_TMPDIR/gcloud"
    REAL=$BATS_TEST_DIRNAME/bin/gcloud PATH=$BATS_TEST_TMPDIR:$PATH run "$deploy"
    [ "$status" -eq 0 ]
    [ -e "$GCLOUD_STATE/tried" ]
}

@test "weights that arrive damaged are not deployed" {
    GCLOUD_CORRUPT=1 run "$deploy"
    [ "$status" -eq 1 ]
    said 'is not what'
    not_called 'services replace'
}

@test "a service that does not draw is no success" {
    CURL_STATUS=502 run "$deploy"
    [ "$status" -eq 1 ]
    said 'did not draw: 502'
    said 'gcloud run services logs read image-generator'
}

@test "delete takes away everything that was made, and can be run again" {
    deployed
    run "$deploy" --delete --yes
    [ "$status" -eq 0 ] || { echo "$output" && false; }
    for kind in services buckets objects repositories accounts alerts; do
        [ -z "$(ls "$GCLOUD_STATE/$kind")" ] || { echo "left: $kind" && ls "$GCLOUD_STATE/$kind" && false; }
    done
    run "$deploy" --delete --yes
    [ "$status" -eq 0 ]
}

@test "delete asks, and takes only the service's name for a yes" {
    deployed
    run "$deploy" --delete <<<yes
    [ "$status" -eq 1 ]
    said 'nothing was deleted'
    run "$deploy" --delete </dev/null
    [ "$status" -eq 1 ]
    [ -e "$GCLOUD_STATE/services/image-generator" ]
    run "$deploy" --delete <<<image-generator
    [ "$status" -eq 0 ]
    [ ! -e "$GCLOUD_STATE/services/image-generator" ]
}

@test "a dry run of delete deletes nothing" {
    deployed
    run "$deploy" --delete --dry-run
    [ "$status" -eq 0 ]
    [ -z "$(log)" ]
    said 'run services delete'
    said 'storage rm --recursive gs://'
}
