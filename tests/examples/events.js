// With EventSource, in a browser: a digit on its way. Give it a URL and a picture: watchDigit("/v1/digits/7", img).
function watchDigit(url, img) {
  return new Promise((resolve, reject) => {
    const events = new EventSource(url);
    const show = (event) => {
      img.src = `data:image/png;base64,${JSON.parse(event.data).png}`;
    };
    events.addEventListener("preview", show);
    events.addEventListener("digit", show);
    events.addEventListener("done", (event) => {
      events.close();
      resolve(JSON.parse(event.data));
    });
    // The server's own last record has data; a lost connection has none, and the browser tries again by itself.
    events.addEventListener("error", (event) => {
      if (!event.data) return;
      events.close();
      reject(new Error(JSON.parse(event.data).problem.detail));
    });
  });
}
