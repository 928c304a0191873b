"""Clicks through the page in chromium: cold with progress, drawing, done, an error, dark, phone width.

    python tests/page/test.py BINARY [--shots FOLDER]

Says that it is skipped where chromium, its driver or selenium is missing.
"""

import argparse
import http.server
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time

arguments = argparse.ArgumentParser()
arguments.add_argument("binary")
arguments.add_argument("--shots", type=pathlib.Path)
arguments = arguments.parse_args()

try:
    from selenium import webdriver
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait
except ImportError:
    sys.exit(print("skipped: there is no selenium (scripts/test-tools installs it)"))
chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
if not (chromium and driver):
    sys.exit(print("skipped: there is no chromium with chromedriver (Debian: apt install chromium chromium-driver)"))

WEIGHTS = pathlib.Path(__file__).parents[2] / "src/model/mnist.safetensors"
RATE = 2_500_000


class Store(http.server.BaseHTTPRequestHandler):
    """The weights, at RATE bytes a second in all."""

    protocol_version = "HTTP/1.1"
    turn = threading.Lock()

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        if not self.path.endswith("mnist.safetensors"):
            self.send_response(404)
            self.send_header("content-length", "0")
            self.end_headers()
            return
        data, total = WEIGHTS.read_bytes(), WEIGHTS.stat().st_size
        start, end = 0, total
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range", "")):
            start, end = int(asked[1]), min(total, int(asked[2]) + 1 if asked[2] else total)
            self.send_response(206)
            self.send_header("content-range", f"bytes {start}-{end - 1}/{total}")
        else:
            self.send_response(200)
        self.send_header("etag", '"1"')
        self.send_header("content-length", str(end - start))
        self.end_headers()
        for at in range(start, end if body else start, 50_000):
            with self.turn:
                time.sleep(50_000 / RATE)
            self.wfile.write(data[at : min(at + 50_000, end)])

    def log_message(self, *_):
        pass


def serve(**environment):
    """The service's URL and process."""
    process = subprocess.Popen(
        [arguments.binary],
        env={"PORT": "0", "HOST": "127.0.0.1", **environment},
        stdout=subprocess.PIPE,
        text=True,
    )
    address = re.search(r'"address":"([^"]+)"', process.stdout.readline())[1]
    threading.Thread(target=process.stdout.read, daemon=True).start()
    processes.append(process)
    return f"http://{address}/", process


def browser(*switches):
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for switch in ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--window-size=1100,1150", *switches]:
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    options.add_experimental_option("prefs", {"download.default_directory": folder})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    browsers.append(found)
    return found


def shot(name):
    if arguments.shots:
        arguments.shots.mkdir(parents=True, exist_ok=True)
        page.save_screenshot(str(arguments.shots / f"{name}.png"))


def wait(what, condition):
    WebDriverWait(page, 60, poll_frequency=0.03).until(lambda _: condition(), what)


def element(name):
    return page.find_element(By.ID, name)


def ink():
    """How many cells have ink on them."""
    return page.execute_script(
        "return [...document.querySelectorAll('#sheet canvas')].filter(c => c.dataset.label !== undefined &&"
        " c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some((v, i) => i % 4 < 3 && v > 128)).length"
    )


def complaints():
    """What the browser has to say: a policy that was broken, a file that was missing, an error."""
    return [line["message"] for line in page.get_log("browser") if line["level"] == "SEVERE"]


processes, browsers = [], []
folder = tempfile.mkdtemp()
store = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Store)
threading.Thread(target=store.serve_forever, daemon=True).start()
try:
    url, service = serve(MODEL_URI=f"http://127.0.0.1:{store.server_address[1]}/mnist.safetensors", RANGE_MB="1")
    page = browser()
    page.get(url)
    wait("the model's state", lambda: "asleep" in element("model-text").text)
    shot("asleep")

    # Cold: Enter, and a bar that moves.
    element("digits").clear()
    element("digits").send_keys("20260", Keys.ENTER)
    wait("a bar", lambda: element("progress").is_displayed() and float(element("progress").get_attribute("value") or 0) > 0)
    before = float(element("progress").get_attribute("value"))
    wait("a bar that moves", lambda: float(element("progress").get_attribute("value") or 9e9) > before + 1_500_000)
    assert "MB" in element("loading-text").text
    shot("cold")
    wait("digits", lambda: ink() == 5)
    wait("the end", lambda: element("after").is_displayed())
    assert not element("progress").is_displayed()
    assert "ready" in element("model-text").text
    shot("done")
    print("cold: a bar with bytes, then", element("said").text)

    # The keys of a keyboard reach everything, and what is drawn has a name.
    assert "2 0 2 6 0" in element("sheet").get_attribute("aria-label")
    assert page.execute_script("return [...document.querySelectorAll('input, button')].every(e => e.labels?.length || e.textContent.trim() || e.ariaLabel)")

    # Warm and slow: steps are shown on their way.
    page.execute_script("for (const [id, v] of [['steps', 32], ['count', 12]]) { const e = document.getElementById(id); e.value = v; e.dispatchEvent(new Event('input', {bubbles: true})); }")
    element("digits").clear()
    element("digits").send_keys("0123456789")
    element("draw").click()
    on_the_way = "return document.querySelectorAll('#sheet canvas:not(.waiting):not([data-label])').length"
    wait("steps", lambda: ink() > 8 and page.execute_script(on_the_way) > 0)
    shot("drawing")
    element("digits").send_keys(Keys.ESCAPE)
    wait("a stop", lambda: element("said").text == "Stopped.")
    assert ink() < 120 and element("draw").is_displayed()

    # A seed that is kept draws the same again; the code says the same.
    page.execute_script("for (const [id, v] of [['steps', 4], ['count', 1]]) { const e = document.getElementById(id); e.value = v; e.dispatchEvent(new Event('input', {bubbles: true})); }")
    element("digits").clear()
    element("digits").send_keys("42", Keys.ENTER)
    wait("two digits", lambda: ink() == 2 and element("after").is_displayed())
    pixels = "return [...document.querySelectorAll('#sheet canvas')].map(c => c.toDataURL()).join()"
    first = page.execute_script(pixels)
    element("again").click()
    seed = element("seed").get_attribute("value")
    assert seed and f'"seed":{seed}' in element("code").text
    element("draw").click()
    wait("the same digits", lambda: ink() == 2 and element("after").is_displayed() and page.execute_script(pixels) == first)
    element("tab-curl").send_keys(Keys.ARROW_RIGHT)
    assert "import requests" in element("code").text
    element("tab-python").send_keys(Keys.ARROW_RIGHT)
    assert "await fetch" in element("code").text
    element("save-apng").click()
    saved = pathlib.Path(folder) / f"42-{seed}.apng.png"
    wait("a download", saved.exists)
    wait("the whole download", lambda: saved.read_bytes().endswith(b"IEND\xaeB`\x82"))
    assert b"acTL" in saved.read_bytes()

    # An EventSource draws too, warm, and does not begin anew.
    page.set_script_timeout(30)
    example = (pathlib.Path(__file__).parents[1] / "examples/events.js").read_text()
    done = page.execute_async_script(
        example + "const done = arguments[0], img = new Image(); watchDigit('v1/digits/7?seed=3', img)"
        ".then(async (d) => { await img.decode(); d.width = img.naturalWidth; done(d); }, (e) => done(String(e)));"
    )
    assert done["digits"] == 1 and done["width"] == 28, done

    # What a client did is explained, and nothing of it becomes markup.
    element("digits").clear()
    element("digits").send_keys("<b>x</b>", Keys.ENTER)
    wait("an error", lambda: element("problem").is_displayed())
    assert "<b>" not in element("problem").get_attribute("innerHTML").replace("&lt;b&gt;", "")
    shot("error")
    assert not [c for c in complaints() if "400" not in c], complaints()

    # The server goes away in the middle.
    service.kill()
    element("digits").clear()
    element("digits").send_keys("1", Keys.ENTER)
    wait("an error", lambda: "cannot be reached" in element("problem").text)

    url, _ = serve()
    page = browser("--force-dark-mode", "--blink-settings=preferredColorScheme=0")
    page.get(url)
    element("draw").click()
    wait("four digits", lambda: ink() == 4 and element("after").is_displayed())
    shot("dark")
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": 375, "height": 1000, "deviceScaleFactor": 2, "mobile": True})
    wait("no sideways scrolling", lambda: page.execute_script("return document.documentElement.scrollWidth <= 375"))
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "light"}]})
    shot("phone")
    assert not complaints(), complaints()

    # With keys the page asks for one.
    url, _ = serve(API_KEYS="correct-horse")
    page.get(url)
    wait("the field for the key", lambda: element("key").is_displayed())
    element("key").send_keys("correct-horse", Keys.ENTER)
    wait("digits", lambda: ink() == 4)
    print("the page: all as it should be")
finally:
    for found in browsers:
        found.quit()
    for process in processes:
        process.kill()
    shutil.rmtree(folder, ignore_errors=True)
