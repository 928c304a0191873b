// The service on Railway. Applied with `railway config apply`; see the page beside this folder.
import { defineRailway, github, project, service } from "railway/iac";

export default defineRailway(() => {
  const imageGenerator = service("image-generator", {
    source: github("image-generator/image-generator", { branch: "main" }),
    build: {
      builder: "DOCKERFILE",
      dockerfilePath: "Dockerfile",
      watchPatterns: ["src/**", "Cargo.toml", "Cargo.lock", "Dockerfile"],
    },
    deploy: {
      // Asked until it answers when a deployment starts, and never again.
      healthcheckPath: "/health/ready",
      healthcheckTimeout: 60,
      // Stops after ten minutes in which nothing was sent, and starts with the next request.
      sleepApplication: true,
      // Without it SIGKILL follows SIGTERM at once. DRAIN_SECS ends before it.
      drainingSeconds: 30,
      restartPolicyType: "ON_FAILURE",
      restartPolicyMaxRetries: 5,
      limitOverride: { containers: { cpu: 2, memoryBytes: 2 * 1024 ** 3 } },
    },
    variables: {
      PORT: "8080",
      MODEL_URI: "",
      DRAIN_SECS: "25",
      // A response in which nothing is sent for five minutes is closed there.
      REQUEST_TIMEOUT_SECS: "290",
      // Frees the memory, which is paid for by the minute, before the service sleeps.
      MODEL_IDLE_UNLOAD_SECS: "300",
    },
    networking: { serviceDomains: { "image-generator": { port: 8080 } } },
  });

  return project("image-generator", { resources: [imageGenerator] });
});
