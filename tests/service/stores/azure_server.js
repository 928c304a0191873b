// Azurite's blob service, in memory, with a container `models`. Prints its port, its account and the account's key.
//
// Ends when its standard input does, so that it never outlives the tests, however they end. Its argument is the
// folder that azurite is installed in.

const { createHmac, randomBytes } = require("crypto");
const path = require("path");

// Run by `node -e`, which leaves out the place of the script's own name.
const [folder] = process.argv.splice(1, 1, "azurite");
const account = "tests";
const key = randomBytes(64);
process.env.AZURITE_ACCOUNTS = `${account}:${key.toString("base64")}`;
process.argv.push("--blobHost", "127.0.0.1", "--blobPort", "0", "--inMemoryPersistence", "--disableTelemetry", "--silent");

process.stdin.on("end", () => process.exit(0)).resume();

// Azurite says which port it got in a line for people, and nowhere else.
const print = console.log;
console.log = (line) => {
    const port = /successfully listens on http:\/\/127\.0\.0\.1:(\d+)/.exec(line)?.[1];
    if (port) ready(port).then(() => print(port, account, key.toString("base64")));
};

async function ready(port) {
    const date = new Date().toUTCString();
    const headers = `x-ms-date:${date}\nx-ms-version:2023-11-03\n`;
    const text = `PUT${"\n".repeat(12)}${headers}/${account}/${account}/models\nrestype:container`;
    const signature = createHmac("sha256", key).update(text).digest("base64");
    const answer = await fetch(`http://127.0.0.1:${port}/${account}/models?restype=container`, {
        method: "PUT",
        headers: {
            "x-ms-date": date,
            "x-ms-version": "2023-11-03",
            authorization: `SharedKey ${account}:${signature}`,
        },
    });
    if (!answer.ok) throw new Error(`the container was not made: ${answer.status} ${await answer.text()}`);
}

require(path.resolve(folder, "node_modules/azurite/dist/src/blob/main.js"));
